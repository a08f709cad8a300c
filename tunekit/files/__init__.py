"""Tools over adapter files and bases: convert, merge, extract, resize. One tensor at a time.

What all of them stand on:
    stream.py    safetensors files read and written tensor by tensor
    names.py     every name that a file may have for a base's module, and the one to write
    adapter.py   an adapter file: its modules, factors and alphas, of whoever's making
    sources.py   which base a file is for; the base's weights where they lie
    cut.py       the best change of a lower rank (SVD), and what it loses
    output.py    an adapter file that grows module by module, alpha always right
    opened.py    the file to make, and a base by whose names others are read
    report.py    what is told of ranks that were lowered

The tools:
    convert.py   a file in another client's naming, compared with what it was
    merge.py     what merging is asked for: one of the next two
    folder.py    adapters merged into a base, as a diffusers folder
    mix.py       adapters merged with each other
    extract.py   the difference of two bases as an adapter
    resize.py    an adapter of another rank or kind as a LoRA
"""
