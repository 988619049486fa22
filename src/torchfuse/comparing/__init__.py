"""`compare`: one model as fused and non-fused, float and int8, on every target and device."""
