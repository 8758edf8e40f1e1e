"""What the stand-ins refuse while a stream is captured, and what they do with each launch: run by `run.py`."""

import torch


def refused(work, *, stream, side):
    """Whether the work cannot be part of a graph."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            work(stream, side)
    except (RuntimeError, torch.AcceleratorError):
        torch.cuda.set_stream(torch.cuda.default_stream())
        return True
    return False


def main():
    one, host = torch.arange(4.0, device="cuda"), torch.zeros(4)
    pinned = torch.zeros(4).pin_memory()
    outside = torch.cuda.Event()
    outside.record()
    inside = torch.cuda.Event()

    def forked(main_stream, side):
        inside.record(main_stream)
        side.wait_event(inside)
        with torch.cuda.stream(side):
            one.mul_(2)
        return side

    def joined(main_stream, side):
        back = torch.cuda.Event()
        back.record(forked(main_stream, side))
        main_stream.wait_event(back)

    cases = {
        "a number": (lambda *_: one.sum().item(), True),
        "pageable memory": (lambda *_: one.copy_(host, non_blocking=True), True),
        "a copy that is waited for": (lambda *_: one.copy_(pinned), True),
        "an event outside": (lambda stream, _: stream.wait_event(outside), True),
        "a wait for the stream": (lambda stream, _: stream.synchronize(), True),
        "a side stream that does not come back": (forked, True),
        "one that does": (joined, False),
        "pinned memory": (lambda *_: one.copy_(pinned, non_blocking=True), False),
    }
    for name, (work, expected) in cases.items():
        # a stream that was left in a capture stays there
        found = refused(work, stream=torch.cuda.Stream(), side=torch.cuda.Stream())
        assert found == expected, f"{name}: {'refused' if found else 'taken'}"

    total, graph = torch.zeros(4, device="cuda"), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        doubled = one * 2
        total += doubled
    assert not total.any(), "what is captured does not run"
    for launches in range(1, 4):
        one.fill_(launches)
        graph.replay()
        assert torch.equal(doubled.cpu(), torch.full((4,), 2.0 * launches))
    assert torch.equal(total.cpu(), torch.full((4,), 12.0))


if __name__ == "__main__":
    main()
