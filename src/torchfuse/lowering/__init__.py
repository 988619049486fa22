"""A model as an exported program in the form that a runtime takes."""
