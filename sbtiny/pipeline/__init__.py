"""What joins the stages: the demo, which runs them all."""
