"""From collected pictures to a training set: scan, filter, dedup, contamination, caption, balance, export.

Each `.py` beside this file is a command; `run` does all of them from one YAML file. `rules/` decides from numbers and
words alone, `shards/` runs work shard by shard, `records/` reads and writes data, `models/` has what needs a network,
`stages/` puts them together. `docs/curation.md` goes through it.

The paper names "meticulous data curation" and does not publish it: what is here follows the published practice of
LAION, Emu2 and BLIP3-o, and claims nothing about the paper's data.
"""
