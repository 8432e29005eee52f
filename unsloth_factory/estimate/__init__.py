"""What a training will need, before it starts: one step is rehearsed with tensors that have sizes but no contents.

`allocator` is a model of torch's caching allocator, `rehearsal` the tape and the clock, `decoder` the model's forward
and backward pass in sizes, `memory` and `speed` what comes out, `search` the settings that fit. No torch is imported.
"""
