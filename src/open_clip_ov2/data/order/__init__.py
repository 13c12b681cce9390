"""Which sample comes when, and how a run finds its place again. A test runs the example below.

A consumer is a stream of samples: that of one data worker of one process, or, with --elastic, one of a number that the
user sets (layout.py). In each pass over the data the shards are shuffled and dealt out to the consumers in turns; each
consumer reads its shards one after the other and mixes their samples in a shuffle buffer. All of this follows from
seed, epoch, pass, consumer and counts, never from what the samples contain, so it can be repeated without reading them.
An example: two shards of three samples, two consumers, and a buffer of two samples.

>>> from open_clip_ov2.data.order.assignment import Assignment, Cursor, Position, ShuffledPass, assigned_shards
>>> shards = [["a0", "a1", "a2"], ["b0", "b1", "b2"]]
>>> order = [1, 0]  # as shuffled for this pass: b, then a
>>> def one(consumer, consumers, history=()):
...     return Assignment(0, 0, 0, consumer, consumers, shuffle_buffer=2, history=history)
>>> def read(assignment, cursor):
...     open_shard = lambda shard, on_broken: (sample for sample in shards[shard])
...     return iter(ShuffledPass(assigned_shards(order, assignment), assignment, cursor, open_shard, print))

Each consumer gets one shard. The run is stopped after three samples: two from consumer 0 and one from consumer 1.

>>> [assigned_shards(order, one(consumer, 2)) for consumer in (0, 1)]
[[ShardRange(shard=1, scattered=frozenset(), start=0)], [ShardRange(shard=0, scattered=frozenset(), start=0)]]
>>> cursors = [Cursor(), Cursor()]
>>> first, second = [read(one(consumer, 2), cursors[consumer]) for consumer in (0, 1)]
>>> next(first), next(second), next(first)
('b1', 'a0', 'b0')

A checkpoint stores a position for each consumer: the pass, how many samples it has given out, and the sizes of the
shards that it has read to their end (here none so far: the buffer holds the samples that were read ahead).

>>> positions = tuple(Position(0, cursor.taken, tuple(cursor.sizes)) for cursor in cursors)
>>> positions
(Position(pass_index=0, taken=2, sizes=()), Position(pass_index=0, taken=1, sizes=()))

Resumed with two consumers, each repeats its shuffle up to its position and continues with the next sample.

>>> [list(read(one(consumer, 2), Cursor(p.taken, list(p.sizes)))) for consumer, p in enumerate(positions)]
[['b2'], ['a1', 'a2']]

Resumed with another number of consumers, the old positions become the history of the pass. From them each new consumer
works out what is left of it and which part of that is its own: nothing is lost and nothing comes twice.

>>> assigned_shards(order, one(0, 1, history=(positions,)))
[ShardRange(shard=1, scattered=frozenset({2}), start=3), ShardRange(shard=0, scattered=frozenset({1}), start=2)]
>>> list(read(one(0, 1, history=(positions,)), Cursor()))
['a1', 'b2', 'a2']
>>> [list(read(one(consumer, 3, history=(positions,)), Cursor())) for consumer in (0, 1, 2)]
[['b2'], ['a1', 'a2'], []]
"""
