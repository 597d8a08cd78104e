"""A viewer in the browser, for particles while they train and after; needs viser, of the extra `view`."""
