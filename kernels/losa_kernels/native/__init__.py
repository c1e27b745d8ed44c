"""CPU kernels in C++: the same functions as `reference`, for all segments of a group in one call.

`library` finds the binary and the CPU's instruction set, `layout` describes pages and segments, `attention`,
`selection` and `store` check tensors and call. Built by `make kernels`; nothing here is needed where it is missing.
"""
