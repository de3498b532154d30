"""Low-rank adapters (LoRA): PEFT files, the parameters that take them, and the products that add their own."""
