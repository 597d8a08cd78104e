"""Many runs from a file of prompts: plan, submit, watch, collect."""
