"""``diffalign doctor``: test what training needs on this machine, and suggest a fix for each problem."""
