"""Signs of life between the processes of a calibration: one that died is named, instead of waited for in vain."""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
import warnings

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

BEAT = 3.0  # seconds between two signs of life
SILENCE = 30.0  # after so many seconds without one, a process counts as dead
_POLL = 0.004  # seconds between two looks at who has arrived
_DONE = "done"


class RollCall:
    """What one process of a calibration tells the others, and knows of them, through the store of the process group.

    A thread posts every few seconds that this process lives, and where it is. When another one is silent for long, a
    warning names it at once, and this process stops at its next prompt or when it has to wait for the others. One that
    fails with an exception posts that.

    Args:
        rank, world: of this process, and how many there are; the constructor waits for all of them.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.others = rank, [other for other in range(world) if other != rank]
        names = [uuid.uuid4().hex]
        dist.broadcast_object_list(names)  # of this calibration: a process group may see several
        self._store = dist.PrefixStore(names[0], _get_default_store())
        self._lost: str | None = None
        self._place, self._beats, self._meetings = "the beginning", 0, 0
        self._heard = {other: ("", time.monotonic()) for other in self.others}
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._live, name="spas_attn roll call", daemon=True)
        self._thread.start()

    def at(self, place: str) -> None:
        """Say where this process is; a RuntimeError when another one has died."""
        self.check()
        self._place = place
        self._post()

    def check(self) -> None:
        """Raise a RuntimeError when another process has died."""
        if self._lost is not None:
            raise RuntimeError(
                f"{self._lost}; this is rank {self.rank}, at {self._place}. Prompts that were finished are in the "
                "checkpoint, if one was named: resume from it"
            )

    def meet(self) -> None:
        """Wait until all processes have come here; a RuntimeError when one has died."""
        self._meetings += 1
        name = f"meeting {self._meetings} of "
        self._store.set(f"{name}{self.rank}", "")
        arrived = [f"{name}{other}" for other in self.others]
        while not self._store.check(arrived):
            self.check()
            time.sleep(_POLL)

    def leave(self, error: BaseException | None) -> None:
        """Stop giving signs of life; say why, unless the calibration has finished."""
        self._left.set()
        self._thread.join()
        what = _DONE if error is None else f"stopped at {self._place} with {type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store may have died, which is why we leave
            self._store.set(f"end of {self.rank}", what)

    def _live(self) -> None:
        while self._lost is None and not self._left.wait(BEAT):
            try:
                self._post()
                self._lost = self._missing()
            except RuntimeError as error:  # its store went with it
                self._lost = (
                    f"the process that holds the store of the process group (rank 0 or a launcher) died: {error}"
                )
            if self._lost is not None:
                warnings.warn(f"calibration: {self._lost}", RuntimeWarning, stacklevel=1)

    def _post(self) -> None:
        self._beats += 1
        self._store.set(f"life of {self.rank}", f"{self._beats} {self._place}")

    def _missing(self) -> str | None:
        """Which process died, and where it was; None while all live or are done."""
        now = time.monotonic()
        for other in self.others:
            if self._store.check([f"end of {other}"]):
                end = self._store.get(f"end of {other}").decode()
                if end != _DONE:
                    return f"rank {other} of {len(self.others) + 1} {end}"
                continue
            known, since = self._heard[other]
            said = self._store.get(f"life of {other}").decode() if self._store.check([f"life of {other}"]) else ""
            if said != known:
                self._heard[other] = (said, now)
            elif now - since > SILENCE:
                place = known.partition(" ")[2] or "the beginning"
                return (
                    f"rank {other} of {len(self.others) + 1} has died: it was last at {place} and gave no sign "
                    f"of life for {now - since:.0f} s"
                )
        return None
