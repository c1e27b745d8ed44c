"""The specification of every kernel, in plain torch: slow, obvious, device-independent.

Three rooms: `paging` (where K/V lies), `attention` (softmax over gathered K/V and merging), `selection` (which pages
and which rows). A faster kernel is right when it agrees with these functions on the same inputs. Knows no request.
"""
