"""What every operation computes, in plain torch: the specification of the kernels, and what runs without a GPU.

Same names, arguments and results as the wrappers, which check the arguments. Clear rather than fast.
"""

from __future__ import annotations

import torch

from clo_kernels.coded_pages import decode, encode
from clo_kernels.layout import INT32, NO_PAGE, NO_SLOT, DeviceKV, PageTable, Resolved, window_start
from clo_kernels.page_index import check_index, page_index, token_products


def hit_test(
    query: torch.Tensor,
    anchor: torch.Tensor,
    tau: torch.Tensor,
    *,
    fold: str = "mean",
    importance: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `clo_kernels.hit_test`."""
    missed = ~(folded_cosine(query, anchor, tau.shape[0], fold, importance) >= tau)
    moved = missed.repeat_interleave(query.shape[1] // tau.shape[0], dim=1)
    anchor[moved] = query[moved]
    return out.copy_(missed)


def folded_cosine(
    query: torch.Tensor, anchor: torch.Tensor, num_kv_heads: int, fold: str, importance: torch.Tensor | None
) -> torch.Tensor:
    """Cosine of query and anchor [batch, num_query_heads, head_dim], folded to [batch, num_kv_heads]."""
    now, then = query.float(), anchor.float()
    norms = now.norm(dim=-1) * then.norm(dim=-1)
    cosine = torch.where(norms == 0, 0.0, (now * then).sum(-1) / norms).unflatten(1, (num_kv_heads, -1))
    if fold == "min":
        folded = cosine.amin(-1)
    elif importance is not None:
        shares = importance.unflatten(0, (num_kv_heads, -1))
        folded = (cosine * shares).sum(-1) / shares.sum(-1)
    else:
        folded = cosine.mean(-1)
    anchored = (then != 0).any(-1).unflatten(1, (num_kv_heads, -1)).any(-1)
    return torch.where(anchored, folded, -torch.inf)


def resolve_pages(
    selection: torch.Tensor,
    missed: torch.Tensor,
    table: PageTable,
    *,
    replace: bool = False,
    out: Resolved,
    num_warps: int | None = None,
) -> Resolved:
    """See `clo_kernels.resolve_pages`."""
    out.fetch_pages.fill_(NO_PAGE)
    out.fetch_slots.fill_(NO_SLOT)
    out.num_fetched.zero_()
    batch, heads, budget = selection.shape
    for row in ((b, h) for b in range(batch) for h in range(heads)):
        # plain lists: reading tensors element by element takes a hundred times longer
        slot_of_page, page_of_slot, last_use, selected = (
            tensor[row].tolist() for tensor in (table.slot_of_page, table.page_of_slot, table.last_use, selection)
        )
        wanted = {p: rank for rank, p in enumerate(selected) if 0 <= p < len(slot_of_page)}
        if missed[row]:
            if replace:
                slot_of_page, page_of_slot = [NO_SLOT] * len(slot_of_page), [NO_PAGE] * len(page_of_slot)
            absent = [p for p in wanted if slot_of_page[p] == NO_SLOT]
            in_use = {slot_of_page[p] for p in wanted}
            slots_by_age = sorted(range(len(last_use)), key=last_use.__getitem__)
            free = [slot for slot in (range(len(last_use)) if replace else slots_by_age) if slot not in in_use]
            newest = max(last_use)
            fetched = list(zip(absent, sorted(free[: len(absent)]), strict=True))
            for page, slot in fetched:
                if page_of_slot[slot] != NO_PAGE:
                    slot_of_page[page_of_slot[slot]] = NO_SLOT
                page_of_slot[slot], slot_of_page[page] = page, slot
            for page, rank in wanted.items():
                last_use[slot_of_page[page]] = newest + budget - rank
            out.num_fetched[row] = len(fetched)
            if fetched:
                pages, slots = zip(*fetched, strict=True)
                out.fetch_pages[row][: len(fetched)] = selection.new_tensor(pages)
                out.fetch_slots[row][: len(fetched)] = selection.new_tensor(slots)
            table.slot_of_page[row] = selection.new_tensor(slot_of_page)
            table.page_of_slot[row] = selection.new_tensor(page_of_slot)
            table.last_use[row] = selection.new_tensor(last_use)
        out.slots[row] = selection.new_tensor([slot_of_page[p] if p in wanted else NO_SLOT for p in selected])
    return out


def gather_pages(
    host_pages: torch.Tensor, slots: torch.Tensor, fetch: Resolved, *, num_programs: int = 16
) -> torch.Tensor:
    """See `clo_kernels.gather_pages`."""
    for b, h in fetch.num_fetched.nonzero().tolist():
        count = int(fetch.num_fetched[b, h])
        pages, to = fetch.fetch_pages[b, h, :count].long(), fetch.fetch_slots[b, h, :count].long()
        slots[b, h, to] = host_pages[b, pages.to(host_pages.device), h].to(slots.device)
    return slots


def sparse_decode_attention(
    query: torch.Tensor,
    kv: DeviceKV,
    selected: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    num_splits: int | None = None,
    sink_logits: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `clo_kernels.sparse_decode_attention`."""
    batch, heads = selected.shape[:2]
    for b in range(batch):
        for h in range(heads):
            rows = attended(kv, b, h, selected[b, h], int(lengths[b])).float()
            keys, values = rows[0], rows[-1, :, : kv.value_width]
            group = slice(h * (query.shape[1] // heads), (h + 1) * (query.shape[1] // heads))
            logits = query[b, group].float() @ keys.T * scale
            if sink_logits is not None:
                logits = torch.cat([logits, sink_logits[group, None].float()], 1)
            weights = logits.softmax(-1)[:, : len(keys)]
            out[b, group] = (weights @ values).to(out.dtype)
    return out


def attended(kv: DeviceKV, sequence: int, head: int, selected: torch.Tensor, length: int) -> torch.Tensor:
    """Keys and values [2, tokens, head_dim] that a KV head attends to, or [1, tokens, head_dim] that are both."""
    pin = int(kv.pinned_row[head])
    if pin >= 0:
        return kv.pinned[sequence, pin, :, :length]
    start = window_start(length, kv.recent_tokens, kv.page_size)
    sinks = kv.sinks[sequence, head, :, :start]
    pages = kv.slots[sequence, head, selected[selected != NO_SLOT].long()]
    pages = decode(pages, kv.window.dtype) if kv.coded else pages
    ring = torch.arange(start, length, device=kv.window.device) % kv.ring_tokens
    return torch.cat([sinks, pages.transpose(0, 1).flatten(1, 2), kv.window[sequence, head][:, ring]], 1)


def select_pages(
    scores: torch.Tensor, num_candidates: torch.Tensor, missed: torch.Tensor, selection: torch.Tensor
) -> torch.Tensor:
    """See `clo_kernels.select_pages`."""
    budget = selection.shape[2]
    for b, h in missed.nonzero().tolist():
        ranked = scores[b, h, 1 : int(num_candidates[b]) + 1].nan_to_num(
            nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf
        )
        best = ranked.argsort(descending=True, stable=True)[:budget] + 1
        selection[b, h] = NO_PAGE
        selection[b, h, : len(best)] = best.sort().values.to(selection.dtype)
    return selection


def score_pages(
    query: torch.Tensor,
    index: torch.Tensor,
    num_candidates: torch.Tensor,
    missed: torch.Tensor,
    *,
    scale: float,
    planes: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """See `clo_kernels.score_pages`."""
    grouped = query.float().unflatten(1, (index.shape[1], -1))
    for b, h in missed.nonzero().tolist():
        pages = slice(1, int(num_candidates[b]) + 1)
        if index.dtype == INT32:
            # the attention that falls on a page is that of its tokens
            logits = (token_products(grouped[b, h], index[b, h, pages], planes) * scale).logsumexp(-1)
        else:
            # one product for each of the page's vectors; with minimum and maximum, the larger one bounds every key's
            products = grouped[b, h, :, None, None] * index[b, h, pages].float()
            logits = products.amax(2).sum(-1) * scale
        out[b, h] = -torch.inf
        out[b, h, pages] = logits.softmax(-1).mean(0)
    return out


def append_kv(
    key: torch.Tensor,
    value: torch.Tensor | None,
    lengths: torch.Tensor,
    kv: DeviceKV,
    host_pages: torch.Tensor,
    index: torch.Tensor | None,
    *,
    planes: torch.Tensor | None = None,
) -> None:
    """See `clo_kernels.append_kv`."""
    new, size = torch.stack([key] if value is None else [key, value], 2), kv.page_size
    kind = None if index is None else check_index(index, (len(lengths), -1), key.shape[2], planes, key.device)
    pins = kv.pinned_row.tolist()
    for b, length in enumerate(lengths.tolist()):
        token = length - 1
        leaving = window_start(token, kv.recent_tokens, size)
        moves = window_start(length, kv.recent_tokens, size) > leaving and leaving // size < host_pages.shape[1]
        for h, pin in enumerate(pins if length else []):
            if pin >= 0:
                kv.pinned[b, pin, :, token : token + 1] = new[b, h, :, None, :][:, : max(0, kv.pinned.shape[3] - token)]
                continue
            if moves:
                page = kv.window[b, h].roll(-(leaving % kv.ring_tokens), 1)[:, :size]
                host_pages[b, leaving // size, h] = (encode(page) if kv.coded else page).to(host_pages.device)
                if index is not None and kind is not None:
                    index[b, h, leaving // size] = page_index(page[0], kind, planes)
            kv.window[b, h, :, token % kv.ring_tokens] = new[b, h]
            if token < kv.sinks.shape[3]:
                kv.sinks[b, h, :, token] = new[b, h]


def rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *,
    first: int = 0,
    paired: bool = False,
    out_query: torch.Tensor,
    out_key: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `clo_kernels.rotate`."""
    end = first + cosines.shape[1]

    def turned(vectors: torch.Tensor) -> torch.Tensor:
        own = vectors[..., first:end]
        if paired:
            own = own.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        low, high = own.chunk(2, -1)
        whole = own * cosines[:, None] + torch.cat([-high, low], -1) * sines[:, None]
        return torch.cat([vectors[..., :first], whole, vectors[..., end:]], -1)

    return out_query.copy_(turned(query)), out_key.copy_(turned(key))


def ring_doorbell(sequence: torch.Tensor, message: torch.Tensor, mailbox: torch.Tensor, doorbell: torch.Tensor) -> None:
    """See `clo_kernels.ring_doorbell`."""
    mailbox.copy_(message)
    sequence += 1
    doorbell.copy_(sequence)


def wait_ready(sequence: torch.Tensor, ready: torch.Tensor, report: torch.Tensor, *, max_spins: int) -> None:
    """See `clo_kernels.wait_ready`."""
    spins, number, seen = 0, int(sequence), int(ready)
    while seen != number and spins < max_spins:
        seen, spins = int(ready), spins + 1
    report.copy_(torch.tensor([number, seen, spins]))
