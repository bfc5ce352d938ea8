"""The stages of the curriculum: supervised fine-tuning and GRPO."""
