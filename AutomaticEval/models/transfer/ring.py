"""Copies bytes from a GPU to their last place on the CPU, while the model runs on.

Each device has one ring of pinned chunks, which is made once a process. A stream of its own fills the chunks, and threads empty them
straight into the last place: one copy on the host, made without Python's lock. Does not know what the bytes are.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from AutomaticEval.errors import CaptureError

STAGED = {"cuda"}
"""The kinds of devices whose rows go through a ring. Rows of another device are copied to the CPU directly."""
CHUNK_BYTES = 16 << 20
"""The size of one pinned chunk."""
SIZE_VARIABLE = "AUTOMATICEVAL_PINNED_MB"
"""The environment variable that says how many megabytes of pinned memory a ring has."""
DEFAULT_MB = 256
N_THREADS = min(4, os.cpu_count() or 1)

Land = Callable[[Tensor, int], None]
"""land(bytes, first): puts some of the bytes that were sent, uint8 on the CPU, into their last place. first: the number of the first one."""


class Sending:
    """What one sender sends through a ring. `wait` returns when all of it has landed."""

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._n_waiting = 0
        self._failure: BaseException | None = None
        self._changed = threading.Condition()

    def send(self, values: Tensor, land: Land, unit: int = 1) -> None:
        """Start to copy values, a contiguous tensor on the device that nobody changes any more. The current stream computes them.

        unit: each chunk holds a multiple of so many bytes. Waits only while every chunk of the ring is in use. Raises CaptureError when what was sent earlier did not land.
        """
        self._raise_failure()
        flat = values.view(-1).view(torch.uint8)
        size = max(1, self._ring.chunk_bytes // unit) * unit
        for first in range(0, len(flat), size):
            self._ring.copy(flat[first : first + size], first, land, self)
        self._ring.keep_until_copied(flat)

    def wait(self) -> None:
        """Wait until everything has landed. Raises CaptureError when something did not."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_waiting == 0)
        self._raise_failure()

    def starts(self) -> None:
        """One chunk is on its way."""
        with self._changed:
            self._n_waiting += 1

    def ends(self, failure: BaseException | None) -> None:
        """One chunk has landed, or has failed to."""
        with self._changed:
            self._n_waiting -= 1
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise CaptureError(
                f"rows could not be copied from {self._ring.device} to memory: {self._failure!r}. Nothing of them was stored."
            ) from self._failure


class Ring:
    """Pinned chunks of one device, the stream that fills them, and the threads that empty them."""

    def __init__(self, device: torch.device, n_bytes: int | None = None, chunk_bytes: int = CHUNK_BYTES) -> None:
        """n_bytes: of all chunks together; by default what SIZE_VARIABLE says."""
        self.device, self.chunk_bytes = device, chunk_bytes
        n_chunks = max(2, (_default_bytes() if n_bytes is None else n_bytes) // chunk_bytes)
        self._free = [self._make_chunk() for _ in range(n_chunks)]
        self._n_used = 0
        """How many chunks the threads have."""
        self._changed = threading.Condition()
        self._stream = self._make_stream()
        self._threads = ThreadPoolExecutor(N_THREADS, thread_name_prefix=f"rows from {device}")

    def copy(self, part: Tensor, first: int, land: Land, sending: Sending) -> None:
        """Copy at most one chunk of bytes, and have a thread land them."""
        chunk = self._take_chunk()
        event = self._start_copy(part, chunk[: len(part)])
        sending.starts()
        try:
            self._hand_on(self._empty, chunk, len(part), event, first, land, sending)
        except BaseException as failure:
            sending.ends(failure)
            raise

    def upload(self, host: Tensor) -> Tensor:
        """A tensor of the CPU, on the device: the copy is started, and nothing waits for it. A tensor larger than a chunk is copied as usual."""
        n_bytes = host.numel() * host.element_size()
        if n_bytes > self.chunk_bytes or self.device.type != "cuda":
            return host.to(self.device)
        chunk = self._take_chunk()
        pinned = chunk[:n_bytes].view(host.dtype).view(host.shape)
        pinned.copy_(host)
        there = pinned.to(self.device, non_blocking=True)
        self._hand_on(self._free_after, chunk, self._mark())
        return there

    def wait_until_empty(self) -> None:
        """Wait until every chunk is free again."""
        with self._changed:
            self._changed.wait_for(lambda: self._n_used == 0)

    def keep_until_copied(self, flat: Tensor) -> None:
        """Tell torch not to use the memory of values again before their copy is over."""
        if self.device.type == "cuda":
            flat.record_stream(self._stream)

    def _empty(self, chunk: Tensor, n_bytes: int, event: Any, first: int, land: Land, sending: Sending) -> None:
        """Runs in a thread: land the bytes of a chunk, and free it."""
        failure: BaseException | None = None
        try:
            self._wait(event)
            land(chunk[:n_bytes], first)
        except BaseException as caught:  # raised again where the rows are asked for
            failure = caught
        finally:
            self._give_back(chunk)
            sending.ends(failure)

    def _free_after(self, chunk: Tensor, event: Any) -> None:
        try:
            self._wait(event)
        finally:
            self._give_back(chunk)

    def _take_chunk(self) -> Tensor:
        """A free chunk. Waits for one, unless no thread has any: then the chunks were lost in failures or interrupts, and one is made."""
        with self._changed:
            self._changed.wait_for(lambda: self._free or not self._n_used)
            return self._free.pop() if self._free else self._make_chunk()

    def _hand_on(self, work: Callable[..., None], chunk: Tensor, *arguments: Any) -> None:
        """Have a thread do something with a chunk, and free it then."""
        with self._changed:
            self._n_used += 1
        try:
            self._threads.submit(work, chunk, *arguments)
        except BaseException:
            self._give_back(chunk)
            raise

    def _give_back(self, chunk: Tensor) -> None:
        with self._changed:
            self._n_used -= 1
            self._free.append(chunk)
            self._changed.notify_all()

    def _make_chunk(self) -> Tensor:
        with torch.inference_mode(False):  # threads outside of inference mode fill it, too
            return torch.empty(self.chunk_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _make_stream(self) -> Any:
        """A stream that nobody else is given: torch gives out the same few again, but those of another priority apart."""
        stream: Any = torch.cuda.Stream
        return stream(self.device, priority=-1) if self.device.type == "cuda" else None

    def _start_copy(self, part: Tensor, chunk: Tensor) -> Any:
        """Copy on the ring's stream, after what the current stream computes now. Returns the event of its end."""
        if self.device.type != "cuda":
            chunk.copy_(part)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            chunk.copy_(part, non_blocking=True)
            return self._mark()

    def _mark(self) -> Any:
        """An event at the end of the current stream. A thread that waits for it sleeps."""
        event: Any = torch.cuda.Event
        return torch.cuda.current_stream(self.device).record_event(event(blocking=True))

    def _wait(self, event: Any) -> None:
        if event is not None:
            event.synchronize()


_rings: dict[torch.device, Ring] = {}
_making = threading.Lock()


def ring_of(device: torch.device) -> Ring:
    """The ring of a device. It is made when it is first asked for."""
    with _making:
        if device not in _rings:
            _rings[device] = Ring(device)
        return _rings[device]


def on_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device, without waiting for what the device computes."""
    return ring_of(device).upload(host) if device.type == "cuda" else host.to(device)


def wait_until_sent() -> None:
    """Wait until everything that is on its way to the CPU has arrived."""
    for ring in list(_rings.values()):
        ring.wait_until_empty()


def _default_bytes() -> int:
    given = os.environ.get(SIZE_VARIABLE, "")
    try:
        n_megabytes = int(given or DEFAULT_MB)
    except ValueError:
        n_megabytes = 0
    if n_megabytes < 1:
        raise CaptureError(f"{SIZE_VARIABLE} is {given!r}; it must be a whole number of megabytes, at least 1.")
    return n_megabytes << 20
