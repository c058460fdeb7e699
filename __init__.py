"""What fine-tuning does to a vision-language model: concepts, their shift, and steering."""

__version__ = "0.1.0"
