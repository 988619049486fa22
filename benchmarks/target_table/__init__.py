"""Files of torchfuse beside plain ones: the models, the plain files, what was found as text."""
