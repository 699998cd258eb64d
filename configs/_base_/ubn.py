# What every config with UBN needs beside its norm_cfg: the registration and the checks and curves.
custom_imports = dict(imports=['ubn_det'], allow_failed_imports=False)
custom_hooks = [dict(type='CondensationHook')]
