"""Tars, tables, folders or made-up samples to batches. Imports no OpenCLIP: tokenizer and transform are passed in.

The way of one training sample, from the tar to the `Batch`:
1. `shards.WebDatasetSource` shuffles the shards of the pass; `order.assignment` says which of them this consumer reads.
2. `tars.read_tar` opens one shard and gives its raw samples: key, address, and bytes by suffix.
3. `order.shuffled.ShuffledPass` mixes them through the shuffle buffer and moves the consumer's position on.
4. `streams.TrainStream`, in a data worker, asks for them one by one and seeds each by its key.
5. `samples.Decoder.train` first lets `captions.choose_caption` draw one of its captions by the weights of the keys.
6. `crop.RandomCrop` draws a box; `decode.EncodedImage` decodes as many pixels as it needs; they are cut and resized.
7. What cannot be used raises `skips.SkipSample` with a cause, and `skips.SkipCounter` counts and logs it.
8. When the batch is full, `streams` tokenizes all captions in one call and stacks the images.
9. `receive.Receiver`, in the main process, takes the `Batch` from the worker and adds up its skips.
10. `loader.TrainLoader` records its position, for a checkpoint, and gives it to the training step.
`sources.py` has other sources for step 1 to 3; `eval_loader.EvalLoader` reads in file order and draws nothing.
"""
