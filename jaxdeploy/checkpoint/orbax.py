"""Training state on disk: numbered steps of any pytree, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from jaxdeploy.errors import CheckpointError
from jaxdeploy.files.stored import user_path


class TrainingCheckpoints:
    """The steps kept in one folder; each is complete or absent, because orbax renames a step when it is written.

    ``folder`` is made if it is missing; ``keep`` is how many of the latest steps stay on disk.
    Raises ``CheckpointError``: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, *, keep: int = 3) -> None:
        import orbax.checkpoint as ocp

        self.folder = user_path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        with _one_line(self.folder, "cannot be written"):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, step: int, state: Any) -> None:
        """Write ``state`` (a pytree of arrays and numbers) as ``step``; returns when it is on disk.

        Raises ``CheckpointError``: ``step`` is there already, or the disk refuses.
        """
        import orbax.checkpoint as ocp

        if step in self._manager.all_steps():
            raise CheckpointError(f"step={step} is already saved in {self.folder}; remove it or use another folder")
        with _one_line(self.folder, "cannot be written"):
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)
            self._manager.wait_until_finished()

    def latest(self) -> int | None:
        """The highest complete step, or None where nothing was saved yet."""
        step: int | None = self._manager.latest_step()
        return step

    def steps(self) -> list[int]:
        """The steps on disk, in order."""
        return sorted(self._manager.all_steps())

    def restore(self, step: int, like: Any) -> Any:
        """The state saved as ``step``, with the tree, dtypes and shardings of ``like`` (arrays or shapes).

        Raises ``CheckpointError``: there is no such step, or its tree or shapes differ from ``like``.
        """
        import orbax.checkpoint as ocp

        if step not in self._manager.all_steps():
            raise CheckpointError(f"step={step} is not in {self.folder}; saved steps: {self.steps() or 'none'}")
        with _one_line(self.folder / str(step), "does not fit this training state"):
            return self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Wait for writers and let go of the folder."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _one_line(path: Path, rule: str) -> Iterator[None]:
    """Turn what orbax raises for a bad folder or tree into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(f"checkpoints={path} {rule} ({reason}); use another folder") from error
