"""The picture of a run: what each token used of each layer, kept in a trace file and drawn on one page.

It shows execution, not causation: which parts ran, not what caused the answer. It draws any trace, and so imports core
alone.
"""
