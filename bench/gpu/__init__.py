"""Evidence from a GPU: one script whose steps each write what they measure as soon as they have it.

make gpu-check                                            # all steps
python -m sparse_engine.bench.gpu --steps 3,4 --budget 240
python -m sparse_engine.bench.gpu --device cpu --rehearse  # the same code at small sizes, where there is no GPU
"""
