"""How much is done or remembered at a time: what each number bounds, and why it is that one. A leaf.

But for MAX_TOKENS none of them changes a result: they bear on speed and memory. "The cache" is a core's second level, a
megabyte or two.
"""

from __future__ import annotations

# ---------------------------------------------------------------------------------------------- bytes of text

# What a process is given at a time, or a call works on: long enough that starting costs nothing beside it, short enough
# that its arrays are no burden and that many processes end together.
TASK = 1 << 22
# The same of texts whose lists are made in one process, so that what is left of it to the others is shared evenly.
GROUP = 1 << 20
# Cut into pre-tokens at a time: with its arrays of classes and bounds it stays in the cache.
CHUNK = 1 << 18
# The same of a stream, which is to take less than a megabyte with all its arrays.
STREAM_PIECE = 1 << 14
# Read at a time in the search for a place to cut: mostly the first has one.
WINDOW = 1 << 16
# A part of a corpus that one of several jobs counts.
COUNTED_PART = 1 << 28

# ---------------------------------------------------------------------------------------------- words

# Words looked up at a time, so that the arrays stay in the cache.
WORDS = 1 << 16
# Words that the arrays remember, of each of a few lengths, and ids of words; past either all are forgotten, so that no
# text makes the memory grow without bound. A table has 2^TABLE_BITS slots: at most three quarters are used, by
# MAX_WORDS and one block.
MAX_WORDS, MAX_IDS, TABLE_BITS = 1 << 17, 1 << 22, 18
# The same of short texts, which a dictionary remembers: a Python object each.
MAX_SHORT_TEXT_WORDS = 1 << 16
# Longer words than these are rarely met again and are not remembered: bytes, in the arrays; characters, of short texts.
MAX_WORD_BYTES, MAX_WORD_CHARACTERS = 1 << 10, 1 << 8
# A counter's first table, whose slots of 16 bytes and more fit the cache, and the one behind it, at first.
CACHE_BITS, MIN_COUNT_BITS = 15, 18

# ---------------------------------------------------------------------------------------------- where arrays begin

# Characters of a text below which a dictionary look-up for each word costs less than starting up the arrays; and those
# below which compiled code does, of which new words cost little, while arrays get ahead once they know the words.
SHORT_TEXT, COMPILED_TEXT = 3 << 10, 12 << 10
# Words longer than a table's, of which there are fewer than this, are looked up in a dictionary; counting, counted.
FEW_LOOKED_UP, FEW_COUNTED = 1 << 6, 1 << 7
# Words of fewer bytes in all than so many times the longest are merged one by one: starting up the arrays costs as much
# for one word as for hundreds.
FEW_MERGED = 32
# Bytes of a word from which a heap finds the next merge sooner than a scan, which is quadratic.
HEAP_FROM = 64

# ---------------------------------------------------------------------------------------------- merging words

# Bytes of words that are merged together: all arrays of the matrix then stay in the cache or near it.
CELLS = 1 << 16
# Bytes of the longest word that is a column of the matrix: a row's number takes eight bits of a key.
ROW_BITS = 8
LONGEST = (1 << ROW_BITS) - 1
# Bytes of a window of a longer word. A power of two, since runs of one character have tokens of such lengths.
WORD_WINDOW = 32
# Stretches of so many windows, which are mostly runs of one character, are encoded by windows that much longer.
WINDOW_GROWTH = 8

# ---------------------------------------------------------------------------------------------- training

# Tokens of a vocabulary, at most: two ids and a rank, of 21 bits each, are an entry of the encoder's table of pairs.
MAX_TOKENS = (1 << 21) - 1
# Merges done at once. Twice as many fit the int16 that says which merge a place belongs to.
MAX_BATCH = 1 << 11
# Tokens whose pairs are counted at a time: the arrays stay in the cache.
TOKENS = 1 << 18
# Pairs kept sorted: several batches, at a cost well below one. NEAR: those among which the next are sought, so that
# not all pairs are looked through each time.
FRONT, NEAR = 512, 1 << 13
# Pairs passed over in the search for a batch, and places of its pairs in all: past them there is little left to gain.
PASSED, MAX_PLACES = 24, 1 << 18
# Places at which a pair is looked for, and tokens beside it up to the word's end: rarely more is needed to find one.
TRIES, REACH = 8, 64
