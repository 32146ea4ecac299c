"""Rate control: which form a module takes, and what is coded of it.

`spectrum` has what the choice depends on, `plan` chooses in one currency, `targets` are the factors in steps,
`trial` codes a collection at one step, `addition` codes one task more; `terms` are decoded factors.
"""
