"""Bulk reads, which the bench sets beside `gather_pages`: the same bits arrive; what is refused is no failure."""

import json
import subprocess

import pytest
import torch

from clo_kernels import bulk_gather, reference
from clo_kernels.dispatch import INTERPRETED
from clo_kernels_bench import bulk_reads, run, transfers
from clo_kernels_bench.figures import Figure
from clo_kernels_bench.peaks import Peaks
from tests.kernels.helpers import DEVICE, cases
from tests.kernels.test_gather_pages import bit_patterns, fetch_list, pages_to_fetch, some_to_fetch


@pytest.mark.skipif(DEVICE == "cuda", reason="may take the device's context with it: the bench runs it by itself")
@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@cases("page_size head_dim programs rows", (16, 128, 5, 16), (16, 64, 100, 16), (64, 128, 3, 16), (32, 64, 2, 1))
@some_to_fetch
def test_moves_bits_exactly(counts, page_size, head_dim, programs, rows, monkeypatch):
    monkeypatch.setattr(bulk_gather, "MOST_ROWS", rows)
    host, slots, fetch = pages_to_fetch(counts, page_size, head_dim)
    wanted = reference.gather_pages(host, slots.clone(), fetch)
    assert torch.equal(bulk_gather.bulk_gather(host, slots, fetch, num_programs=programs), wanted)


@pytest.mark.parametrize("page_size", [1, 12, 40])
def test_pages_that_are_read_in_part_are_refused(page_size):
    host = bit_patterns(1, 2, 1, 2, page_size, 128)
    with pytest.raises(ValueError, match=f"a page is {512 * page_size} bytes, expected"):
        bulk_gather.bulk_gather(host, torch.zeros_like(host), fetch_list([[1]], 1, 2, 2), num_programs=1)


class TestInTheBench:
    @pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
    @pytest.mark.parametrize("page_kib", [8, 64])
    def test_pages_that_arrive_otherwise_are_counted(self, page_kib, monkeypatch):
        def all_but_two(pages, slots, fetch, *, num_programs):
            found = bulk_gather.bulk_gather(pages, slots, fetch, num_programs=num_programs)
            found[0, 3, [2, 7]] += 1
            return found

        monkeypatch.setattr(transfers, "HOST_BYTES", 8 << 20)
        device = torch.device("cpu")
        storage = transfers.pinned_storage(device)
        assert bulk_reads.differing_pages(storage, device, page_kib) == 0
        monkeypatch.setattr(bulk_reads, "bulk_gather", all_but_two)
        assert bulk_reads.differing_pages(storage, device, page_kib) == 2

    @pytest.fixture
    def notes(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        return []

    def figures(self, notes):
        return list(run._bulk_reads(Peaks(h2d=55e9, hbm=4e12), float("inf"), notes.append))

    def test_figures_come_from_a_process_of_their_own(self, notes, monkeypatch):
        told = Figure(operation=bulk_reads.OPERATION, case={"page_KiB": 8}, samples_us=(2.0, 3.0), num_bytes=110e3)
        monkeypatch.setattr(run, "_of_its_own", lambda *script, limit_s: json.dumps([told.as_json()]))
        [figure] = self.figures(notes)
        assert (figure.case, figure.samples_us, notes) == (told.case, told.samples_us, [])
        assert figure.share_of_limit == pytest.approx(2 / 2.5)

    @pytest.mark.parametrize(
        "error", [RuntimeError("an illegal memory access"), subprocess.TimeoutExpired("bulk_reads.py", 9)]
    )
    def test_what_is_refused_is_told(self, notes, monkeypatch, error):
        def refuse(*script, limit_s):
            raise error

        monkeypatch.setattr(run, "_of_its_own", refuse)
        assert self.figures(notes) == []
        assert "bulk reads" in notes[0]
        assert str(error) in notes[0]

    def test_older_gpus_have_none(self, notes, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
        assert self.figures(notes) == []
        assert "9.0" in notes[0]

    def test_what_a_process_says_when_it_fails_is_kept(self, tmp_path):
        script = tmp_path / "fails.py"
        script.write_text("raise SystemExit('pages of 8 KiB are not what was read')")
        with pytest.raises(RuntimeError, match="not what was read"):
            run._of_its_own(script, limit_s=60)
