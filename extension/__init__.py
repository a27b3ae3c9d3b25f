"""The WebUI tab. There is none in this version: the door is ready, so that a clone loads without an error."""
