"""`entrypoint prepare`: conversations and documents become token ids, masks and packed rows."""
