{{- define "nightpress.labels" -}}
app.kubernetes.io/part-of: nightpress
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "nightpress.image" -}}
image: {{ printf "%s:%s" .root.Values.image.repository (get .root.Values.image.tags .name) }}
{{- with .root.Values.image.pullPolicy }}
imagePullPolicy: {{ . }}
{{- end }}
{{- end }}

{{- define "nightpress.pod" -}}
automountServiceAccountToken: false
{{- with .Values.image.pullSecrets }}
imagePullSecrets: {{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "nightpress.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "nightpress.containerSecurity" -}}
{allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, capabilities: {drop: [ALL]}}
{{- end }}

{{- define "nightpress.envFrom" -}}
[{configMapRef: {name: nightpress}}, {secretRef: {name: {{ .Values.secret }}}}]
{{- end }}

{{/* New pods when the settings change. */}}
{{- define "nightpress.checksum" -}}
checksum/config: {{ include (print $.Template.BasePath "/config.yaml") . | sha256sum }}
{{- end }}

{{/* A pool of workers as JSON: what it names, over the pool `cpu` or `gpu` of its queue. */}}
{{- define "nightpress.pool" -}}
{{- $queue := .pool.queue | default .name }}
{{- if not (has $queue (list "cpu" "gpu")) }}{{ fail (printf "workers.%s: give its queue, cpu or gpu" .name) }}{{ end }}
{{- $base := get .root.Values.workers $queue }}
{{- if not $base }}{{ fail (printf "workers.%s takes what it doesn't say from workers.%s, which was removed: set workers.%s.replicas to 0 instead" .name $queue $queue) }}{{ end }}
{{- mergeOverwrite (deepCopy $base) (deepCopy .pool) | toJson }}
{{- end }}
