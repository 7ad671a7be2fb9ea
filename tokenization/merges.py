"""Continued BPE training: more merges behind those that a vocabulary already has (Purason et al. 2025, arXiv 2512.03989).

The words come in as the old vocabulary splits them, so that every new piece is built out of two pieces that exist when it is its turn,
and text in which no new piece applies is split as before. (sentencepiece also puts two neighbours together that happen to spell an old
piece, which can keep a new one from ever being used: 1 of 4,000 that were added to a 32,000-piece BPE model for Japanese.)
"""

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import pairwise


def continue_merges(words: Iterable[tuple[list[str], int]], known: set[str], num_pieces: int) -> list[str]:
    """The new pieces in the order in which they merge, `num_pieces` of them or fewer when no other occurs twice.

    words   (symbols, occurrences) of each distinct word; symbols outside `known` are never merged
    known   the pieces that may be merged. A pair that spells one of them stays apart: its merge would change old text.
    """
    known, sequences = set(known), [(list(symbols), count) for symbols, count in words]
    # Counted by what a pair spells, since sentencepiece merges any two neighbours that spell a piece.
    counts: Counter[str] = Counter()
    places: defaultdict[str, set[int]] = defaultdict(set)

    def count_pairs(place: int, sign: int) -> set[str]:
        symbols, count = sequences[place]
        spelled = [left + right for left, right in pairwise(symbols) if left in known and right in known]
        for piece in spelled:
            counts[piece] += sign * count
        return set(spelled)

    for place in range(len(sequences)):
        for piece in count_pairs(place, 1):
            places[piece].add(place)
    heap = [(-count, piece) for piece, count in counts.items()]
    heapq.heapify(heap)
    pieces: list[str] = []
    while heap and len(pieces) < num_pieces:
        negative_count, piece = heapq.heappop(heap)
        # Whenever a count grows it is pushed anew, so an entry may be out of date; where the count has shrunk, it is pushed here.
        if piece in known or counts[piece] < 2 or -negative_count < counts[piece]:
            continue
        if -negative_count > counts[piece]:
            heapq.heappush(heap, (-counts[piece], piece))
            continue
        pieces.append(piece)
        grown: set[str] = set()
        for place in places[piece]:
            count_pairs(place, -1)
        known.add(piece)
        for place in places.pop(piece):
            sequences[place] = _merge(sequences[place][0], piece), sequences[place][1]
            for spelled in count_pairs(place, 1):
                places[spelled].add(place)
                grown.add(spelled)
        for spelled in grown:
            heapq.heappush(heap, (-counts[spelled], spelled))
    return pieces


def _merge(symbols: list[str], piece: str) -> list[str]:
    """Every two neighbours that spell `piece` become it, from the left."""
    merged: list[str] = []
    at = 0
    while at < len(symbols):
        together = at + 1 < len(symbols) and symbols[at] + symbols[at + 1] == piece
        merged.append(piece if together else symbols[at])
        at += 2 if together else 1
    return merged
