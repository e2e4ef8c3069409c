"""What a server was started with: the checkpoint, where it listens, and its limits. Travels as JSON to the child."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Settings:
    """The flags of `pisces serve`; `docs/serve.md` has the limits as a table.

    Args:
        adapters: (name, folder or Hub id) of each adapter, as `--adapter NAME=FOLDER` gave them.
        listener: number of a listening socket that the supervisor opened; None: the child opens it itself.
    """

    model: str = "pisces-tiny"
    revision: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    served_name: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    host: str = "127.0.0.1"
    port: int = 8000
    listener: int | None = None
    api_key: str | None = field(default=None, repr=False)
    allow_urls: bool = False
    verbose: bool = False
    max_body_mib: int = 32
    max_pixels: int = 16_000_000  # of a picture that comes in: 48 MB when decoded
    max_draw_pixels: int = 2**20  # of a picture that is drawn: SDXL's native 1024 x 1024
    max_images: int = 8
    max_prompt_tokens: int = 8192
    max_tokens: int = 1024
    max_n: int = 10  # as OpenAI's own
    max_steps: int = 100
    max_inputs: int = 256
    max_queue: int = 128
    max_batch: int = 8
    batch_wait_ms: float = 5.0
    deadline_s: float = 300.0
    grace_s: float = 20.0

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Settings":
        known = {item.name for item in fields(cls)}
        given = {name: value for name, value in values.items() if name in known}
        given["adapters"] = tuple((name, folder) for name, folder in given.get("adapters", ()))
        return cls(**given)


__all__ = ["Settings"]
