"""Rate control: a budget or an error in, the quantizer step and the form of every module out.

`analysis` has what a choice depends on, `mode_decision` chooses in one currency, `targets` are the factors in
steps, `encode_at_step` codes a collection at one step, `navigate` moves the step until the target is met;
`addition` codes one task more, `terms` are decoded factors, `frontier` walks the whole curve.
"""
