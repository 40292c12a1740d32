"""What a run says about itself: figures, key numbers, one HTML page per subject, methods text.

:mod:`~qsmpipe.reports.maps` holds the maps of one acquisition, :mod:`~qsmpipe.reports.figures`
draws them, :mod:`~qsmpipe.reports.numbers` measures them. :mod:`~qsmpipe.reports.page` and
:mod:`~qsmpipe.reports.boilerplate` read the records that a run leaves in ``logs/``
(:mod:`~qsmpipe.reports.records`) and need neither images nor Nipype.
"""
