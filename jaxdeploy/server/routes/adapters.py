"""``/v1/load_lora_adapter`` and ``/v1/unload_lora_adapter``, as vLLM has them."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from pydantic import Field

from jaxdeploy.server.dependencies import Model, need_keys
from jaxdeploy.server.protocol.fields import Strict

router = APIRouter(tags=["operation"], dependencies=[Depends(need_keys)])


class LoadRequest(Strict):
    """A LoRA adapter in PEFT's layout, in a folder on the server's disk."""

    lora_name: str = Field(min_length=1, max_length=256, description="what requests then name as their model")
    lora_path: str = Field(min_length=1, max_length=4096)
    load_inplace: bool = Field(False, description="one that has the name already is replaced")


class UnloadRequest(Strict):
    """Which one; its number, which vLLM takes too, changes nothing."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None


@router.post("/v1/load_lora_adapter")
async def load_lora_adapter(asked: LoadRequest, service: Model) -> dict[str, str]:
    """Read an adapter, while replies go on. Its name is the answer when requests may ask for it."""
    await service.adapters.load(asked.lora_name, asked.lora_path, in_place=asked.load_inplace)
    return {"loaded": asked.lora_name}


@router.post("/v1/unload_lora_adapter")
async def unload_lora_adapter(asked: UnloadRequest, service: Model) -> dict[str, str]:
    """Forget an adapter; replies that run with it go on to their end."""
    await service.adapters.unload(asked.lora_name)
    return {"unloaded": asked.lora_name}
