{{/* The mark that control process and workers leave. The argument is the command that looks at it. */}}
{{- define "nightpress.alive" -}}
startupProbe: {exec: {command: {{ toJson . }}}, periodSeconds: 10, timeoutSeconds: 10, failureThreshold: 12}
livenessProbe: {exec: {command: {{ toJson . }}}, periodSeconds: 30, timeoutSeconds: 10, failureThreshold: 3}
{{- end }}

{{- define "nightpress.modelsMount" -}}
{{- if .Values.models.enabled }}
- {name: models, mountPath: {{ .Values.models.path }}, readOnly: true}
{{- end }}
{{- end }}

{{- define "nightpress.modelsVolume" -}}
{{- if .Values.models.enabled }}
- {name: models, persistentVolumeClaim: {claimName: {{ .Values.models.claim }}, readOnly: true}}
{{- end }}
{{- end }}
