"""Cold start and budget-guided GRPO."""
