"""Parts that the trainers of the cold start and of GRPO share."""
