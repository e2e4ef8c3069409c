"""What `benchmarks.gpu` measures: drawing and LoRA, at the size of Llama-3.1-8B or at a toy's."""
