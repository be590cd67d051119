"""What a function takes of memory."""

import json

import torch
from torch.profiler import ProfilerActivity, profile


def measured(path, function) -> int:
    """The most that PyTorch's allocator had given away at a time while the function ran."""
    function()  # what libraries keep from their first call
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    record.export_chrome_trace(str(path))
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    held = [event["args"]["Bytes"] for event in sorted(events, key=lambda event: event["ts"])]
    return max(torch.tensor(held).cumsum(0).tolist())
