"""What belongs to one call of `PiscesPipeline`, not to the pipeline: scheduler, guidance, number of steps, interrupt.

Several threads may draw with one pipeline, so each call works on a scheduler of its own and on values of its own.
Callbacks keep diffusers' habits all the same: inside a call `pipe.scheduler`, `pipe._guidance_scale` and
`pipe._interrupt` mean that call, in whichever variable the pipeline is held; between calls they show the latest one.
The pipeline inherits `PipelineCallMixin`; nothing here draws.
"""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any


# locks of the process: inside a pipeline they could be neither copied nor pickled
_PLANNING = threading.Lock()
_OFFLOADED = threading.RLock()  # a callback may draw, too


class Call:
    """The values of one call in progress; `outer` is the call that this one was made in, by a callback."""

    def __init__(self, pipeline: Any, values: dict[str, Any], outer: "Call | None"):
        self.pipeline, self.values, self.outer = pipeline, values, outer


# a context variable, not a thread's: helpers started with the context of a call (asyncio.to_thread) belong to the call
_CURRENT: ContextVar[Call | None] = ContextVar("pisces_pipeline_call", default=None)


def call_values(pipeline: Any) -> dict[str, Any] | None:
    """The values of the innermost call of this pipeline that is running here, or None between calls."""
    call = _CURRENT.get()
    while call is not None and call.pipeline is not pipeline:
        call = call.outer
    return None if call is None else call.values


class CallValue:
    """An attribute that, while a call runs, is the call's own; otherwise the pipeline's."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        if pipeline is None:
            return self
        values = call_values(pipeline)
        try:
            return pipeline.__dict__[self.name] if values is None else values[self.name]
        except KeyError:
            raise AttributeError(f"{type(pipeline).__name__} has no {self.name} yet.") from None

    def __set__(self, pipeline: Any, value: Any) -> None:
        values = call_values(pipeline)
        (pipeline.__dict__ if values is None else values)[self.name] = value


class CallScheduler(CallValue):
    """Swapping the scheduler is for the next calls; the running one has planned its steps already."""

    def __set__(self, pipeline: Any, value: Any) -> None:
        pipeline.__dict__[self.name] = value


class CallInterrupt(CallValue):
    """True stops this call after the step it is at; set from outside any call, it stops all that are running."""

    def __get__(self, pipeline: Any, owner: type | None = None) -> Any:
        values = None if pipeline is None else call_values(pipeline)
        if values is None:
            return super().__get__(pipeline, owner)
        return values[self.name] or values["num_interrupts"] != pipeline.__dict__.get("_num_interrupts", 0)

    def __set__(self, pipeline: Any, value: Any) -> None:
        super().__set__(pipeline, value)
        if value and call_values(pipeline) is None:
            pipeline.__dict__["_num_interrupts"] = pipeline.__dict__.get("_num_interrupts", 0) + 1


class PipelineCallMixin:
    """State of a call; to be inherited before `DiffusionPipeline`."""

    scheduler = CallScheduler()
    _guidance_scale = CallValue()
    _num_timesteps = CallValue()
    _interrupt = CallInterrupt()

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._interrupt

    def _planned_scheduler(self, plan: Callable[[Any], Any]) -> tuple[Any, Any]:
        """A copy of the scheduler with its steps planned, and what `plan(scheduler)` returned.

        The pipeline's own scheduler is planned as well, for those who read its timesteps afterwards; it never steps.
        """
        with _PLANNING:
            scheduler = self.__dict__["scheduler"]  # not that of a call around this one
            planned = plan(scheduler)
            return copy.deepcopy(scheduler), planned

    @contextmanager
    def _one_call(self, scheduler: Any, guidance_scale: float, num_timesteps: int) -> Iterator[None]:
        """Everything inside is one call with values of its own; its last ones stay visible afterwards."""
        shown = {"_guidance_scale": guidance_scale, "_num_timesteps": num_timesteps, "_interrupt": False}
        num_interrupts = self.__dict__.get("_num_interrupts", 0)
        values = {**shown, "scheduler": scheduler, "num_interrupts": num_interrupts}
        # offloading moves whole models between devices, so such a pipeline serves one call after the other
        with _OFFLOADED if getattr(self, "_all_hooks", None) else nullcontext():
            token = _CURRENT.set(Call(self, values, _CURRENT.get()))
            try:
                yield
            finally:
                _CURRENT.reset(token)
                self.__dict__.update({name: values[name] for name in shown})
