"""What stands above the parts: plan, steps, scores and card of `finetune.from_scratch`, and the decoder's adapter."""
