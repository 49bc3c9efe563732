"""LoRA linears under masks, and the controller that hands the masks to them."""
