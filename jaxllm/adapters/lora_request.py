"""How a caller names an adapter: vLLM's `LoRARequest`. Imports nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """An adapter for one call.

    Attributes:
        lora_name: what it is called from now on.
        lora_int_id: a number of the caller's for it, from 1; another number under the same name is another adapter.
        lora_path: the folder that PEFT saved it in.
        load_inplace: read the folder again, whatever is known under this name.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    load_inplace: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name={self.lora_name!r}; give the adapter a name")
        if not isinstance(self.lora_int_id, int) or isinstance(self.lora_int_id, bool) or self.lora_int_id < 1:
            raise ValueError(f"lora_int_id={self.lora_int_id!r}; it must be a whole number of at least 1")
        if not isinstance(self.lora_path, str) or not self.lora_path:
            raise ValueError("lora_path is empty; give the folder that PEFT saved the adapter in")
