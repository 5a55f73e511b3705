"""The only importer of ultralytics: views of a data set, the teacher, the student's trainer, the version gate."""
