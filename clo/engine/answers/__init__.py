"""What a design does to a model's answers, and what is known of the model's heads beforehand."""
