"""The files that ``lite calibrate --work-dir MODEL`` adds to the folder of the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from jaxdeploy.checkpoint.kv_parameters import file_names, write_kv_parameters
from jaxdeploy.checkpoint.marker import add_to_marker, foreign_among, read_marker
from jaxdeploy.compress import report_files
from jaxdeploy.compress.report import Report
from jaxdeploy.errors import ConfigError

COMMAND = "lite calibrate"


class BesideModel:
    """A model ``folder`` that gets KV parameters for ``num_layers`` layers and a report; no other file is touched.

    Raises ``ConfigError``: a file of these names exists, unless jaxdeploy wrote it and ``overwrite`` is true.
    """

    def __init__(self, folder: Path, *, num_layers: int, overwrite: bool) -> None:
        self._folder, self._parameters = folder, file_names(num_layers)
        names = [*self._parameters, report_files.JSON_NAME, report_files.PNG_NAME]
        if others := foreign_among(folder, names):
            raise ConfigError(
                f"work_dir={folder} holds {others[0]}, which jaxdeploy did not write; move that file away, or name "
                "another folder"
            )
        ours = [name for name in names if (folder / name).exists()]
        if ours and not overwrite:
            raise ConfigError(
                f"work_dir={folder} holds {ours[0]} of an earlier run; name another folder, or add --overwrite"
            )

    def write(self, report: Report, parameters: np.ndarray[Any, np.dtype[np.float32]] | None) -> None:
        """Write ``report`` and the KV ``parameters`` [L, 4]; ``None`` deletes those of an earlier run.

        Raises ``ConfigError`` if the folder cannot be written.
        """
        names = [report_files.JSON_NAME, report_files.PNG_NAME]
        try:
            if parameters is None:
                for name in read_marker(self._folder).files.intersection(self._parameters):
                    (self._folder / name).unlink(missing_ok=True)
            else:
                names += self._parameters
            add_to_marker(self._folder, COMMAND, names)
            if parameters is not None:
                write_kv_parameters(self._folder, parameters)
            report_files.write(report, self._folder)
        except OSError as error:
            raise ConfigError(
                f"work_dir={self._folder} cannot be written ({error.strerror}); make room or name another folder"
            ) from error
