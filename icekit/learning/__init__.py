"""What a learner is made of: the loop of steps and its checkpoint, the losses, LoRA, prior preservation, templates."""
