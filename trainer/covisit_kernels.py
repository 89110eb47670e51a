"""Compiled loops of `covisit`: counting pairs, and scoring all items.

Station: under `covisit`, which owns the arrays and says what they mean. It keeps nothing.

A line is a set of an item's partners: `WAYS` rows (int32), then as many estimates (float32), on one cache line. Places
in memory are unsigned, for which the compiler asks no question whether they are negative.
"""

from __future__ import annotations

import numba
import numba.extending
import numpy as np
from llvmlite import ir

from streams.kernel import kernel

WAYS = 8
"""Places of a set."""


@numba.extending.intrinsic
def _prefetch(_typing, address):  # type: ignore[no-untyped-def]
    """Asks memory for the cache line at this address, and waits for nothing."""

    def code(_context, builder, _signature, args):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        builder.call(prefetch, [place, number(1), number(3), number(1)])  # to write, to be kept, data
        return ir.Constant(ir.LiteralStructType([]), ir.Undefined)

    return numba.types.void(address), code


@kernel
def count(  # type: ignore[no-untyped-def]
    numbers, counts, before, set_of, num_clicks, rows, history_rows, history_offsets, window, weight, clicks_counted
):
    num_sets = np.uintp(numbers.size // (2 * WAYS * max(len(set_of), 1)))
    memory = np.uintp(numbers.ctypes.data)
    # Two clicks, in turn: the lines of the next are asked for before this one is counted, so that none is waited for.
    newest = np.empty((2, window), np.int32)
    lines = np.empty((2, 2 * window), np.uintp)
    found = np.zeros(2, np.int64)
    for i in range(len(rows) + 1):
        if i < len(rows):
            turn = i & 1
            clicked = np.int32(rows[i])
            own_line = np.uintp(clicked) * num_sets
            own_set = np.uintp(set_of[clicked])
            n = 0
            for at in range(history_offsets[i + 1] - 1, history_offsets[i] - 1, -1):
                item = np.int32(history_rows[at])
                if item < 0 or item == clicked:
                    continue
                repeated = False
                for k in range(n):
                    repeated |= newest[turn, k] == item
                if repeated:
                    continue
                newest[turn, n] = item
                one_line = (own_line + np.uintp(set_of[item])) * np.uintp(2 * WAYS)
                two_line = (np.uintp(item) * num_sets + own_set) * np.uintp(2 * WAYS)
                lines[turn, 2 * n], lines[turn, 2 * n + 1] = one_line, two_line
                _prefetch(memory + one_line * np.uintp(4))
                _prefetch(memory + two_line * np.uintp(4))
                n += 1
                if n == window:
                    break
            found[turn] = n
        if i == 0:
            continue
        turn = (i - 1) & 1
        clicked = np.int32(rows[i - 1])
        for k in range(found[turn]):
            # splitmix64 (Steele et al. 2014) of the pair's number: two chances of 24 bits
            bits = np.uint64((clicks_counted + i - 1) * window + k) * np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits ^= bits >> np.uint64(31)
            one = np.float32(bits >> np.uint64(40)) * np.float32(2.0**-24)
            two = np.float32(bits & np.uint64(0xFFFFFF)) * np.float32(2.0**-24)
            _add(numbers, counts, before, lines[turn, 2 * k], newest[turn, k], weight, one)
            _add(numbers, counts, before, lines[turn, 2 * k + 1], clicked, weight, two)
        num_clicks[clicked] += weight


@numba.njit(nogil=True, fastmath={"nnan", "ninf", "nsz", "reassoc"}, inline="always")
def _add(numbers, counts, before, line, other, weight, chance):  # type: ignore[no-untyped-def]
    # Loops without an early end, over 32-bit numbers: the compiler makes vector instructions of them.
    at = np.int32(-1)
    for k in range(np.uintp(WAYS)):
        at = max(at, np.int32(k) if numbers[line + k] == other else np.int32(-1))
    estimates = line + np.uintp(WAYS)
    if at >= 0:
        counts[estimates + np.uintp(at)] += weight
        return
    minimum = counts[estimates]
    for k in range(np.uintp(WAYS)):
        minimum = min(minimum, counts[estimates + k])
    if chance * (minimum + weight) < weight:  # always where a place is free: its estimate is 0
        at = np.int32(0)
        for k in range(np.uintp(WAYS)):
            at = max(at, np.int32(k) if counts[estimates + k] == minimum else np.int32(0))
        place = np.uintp(at)
        numbers[line + place], counts[estimates + place] = other, minimum + weight
        if minimum > 0:  # else it is 0 already
            before[(line >> np.uintp(1)) + place] = minimum


@kernel
def add_scores(  # type: ignore[no-untyped-def]
    numbers, counts, before, clicks, history_rows, history_offsets, history_length, decay, norm, unit, scores
):
    # Who has row h in the history: a chain of the places in `reader`, `weight`, from `first`[h].
    num_sets = np.uintp(numbers.size // (2 * WAYS * len(clicks)))
    asked = np.zeros(len(clicks) + 1, np.uint8)  # of row − 1, so that it may be asked of a free place
    first = np.full(len(clicks), -1, np.int32)
    after = np.empty(len(history_rows), np.int32)
    reader = np.empty(len(history_rows), np.int32)
    weight = np.empty(len(history_rows), np.float32)
    used = 0
    for i in range(len(history_offsets) - 1):
        length = min(history_offsets[i + 1] - history_offsets[i], history_length)
        total = 0.0
        for age in range(length):
            total += decay**age
        for age in range(length):
            item = history_rows[history_offsets[i + 1] - 1 - age]
            if item >= 0:
                reader[used], weight[used] = i, decay**age / total / (clicks[item] * unit + 1)
                after[used], first[item] = first[item], used
                asked[item + 1] = 1
                used += 1
    line = np.uintp(0)
    for row in range(scores.shape[1]):
        by = norm * unit / (clicks[row] * unit + 1)
        for _ in range(num_sets):
            some = np.uint8(0)
            for k in range(np.uintp(WAYS)):
                some |= asked[np.uintp(numbers[line + k] + np.int32(1))]
            if some:
                for k in range(np.uintp(WAYS)):
                    item = np.uintp(numbers[line + k] + np.int32(1))
                    if asked[item]:
                        own = counts[line + np.uintp(WAYS) + k] - before[(line >> np.uintp(1)) + k]
                        value = np.float32(by * own)
                        place = first[item - np.uintp(1)]
                        while place >= 0:
                            scores[reader[place], row] += weight[place] * value
                            place = after[place]
            line += np.uintp(2 * WAYS)
