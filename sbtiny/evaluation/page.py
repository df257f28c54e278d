"""The page of a report for the browser, self-contained, and the model card."""
