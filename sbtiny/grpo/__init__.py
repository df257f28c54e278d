"""Budget-guided GRPO: groups, rollouts, reward, relabelling, alarms, trainer."""
