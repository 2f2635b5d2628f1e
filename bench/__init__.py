"""Benchmarks of the ops and of what is built on them, run by `ssah-fast bench`; see bench/README.md.

`harness` measures cases, `clock` times calls on a device, `records` keeps and compares rows, `picture` draws them;
every other module makes the cases of one op.
"""
