"""Transform coding of adapter collections: which form a module takes, and how its factors become bytes.

`plan` chooses forms in one currency, `trellis` quantises, `classes` is the statistical model, `entropy`
the coder, `streams` lays symbols out in lanes, `codec` puts them together.
"""
