"""One row taken out of a decode batch with all that SGLang keeps of it beside the request.

`ScheduleBatch.copy()` is a snapshot for the processing of results: it has neither lengths nor sampling state. `filter_batch` and
`merge_batch` rebind what they change and write in place to one list alone, so a shallow copy is enough, down to the penalizers,
which hold what a request's earlier tokens cost it.
"""

from __future__ import annotations

import copy
from typing import Any

from sglang_dcp.upstream.step.penalties import copy_penalizers


def take_row(batch: Any, place: int) -> Any:
    """A ScheduleBatch of the one row, before the row leaves `batch`. Its last token waits in SGLang's future map, by pool row."""
    row = copy.copy(batch)
    row.batch_is_full = False
    row.reqs = list(batch.reqs)
    row.sampling_info = copy.copy(batch.sampling_info)
    if batch.sampling_info.custom_params is not None:  # merging appends in place
        row.sampling_info.custom_params = list(batch.sampling_info.custom_params)
    row.sampling_info.penalizer_orchestrator = copy_penalizers(batch.sampling_info.penalizer_orchestrator, row)
    row.filter_batch(keep_indices=[place])
    return row
