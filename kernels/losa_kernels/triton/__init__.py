"""The kernels of a GPU, in Triton: attention over lists made on the device, merging, selection, storing.

Each room holds one family: a kernel and a typed function that takes tensors and launches it. Nothing here waits for
the device: how much there is to do is read on the device, and the host gives upper bounds. A result is a function of
a request's own rows, pages and length, never of its neighbours. `losa_kernels.reference` says what is right; natural
log-sum-exps and float32 statistics go in and out. Knows no request. Importing a room needs triton.
"""
